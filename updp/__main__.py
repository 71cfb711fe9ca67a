"""``python -m updp`` is the command ``updp``."""

from updp.cli import main

if __name__ == "__main__":
    main()
