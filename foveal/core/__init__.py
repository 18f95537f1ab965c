"""Words that everyone uses: errors, registry, layouts, context, budgets, JSON."""
