"""``python -m foveal``, and ``torchrun … -m foveal``."""

from .cli import main

if __name__ == "__main__":
    main()
