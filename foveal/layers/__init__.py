"""nn.Modules with parameters of their own."""
