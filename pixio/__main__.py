"""`python -m pixio …`, the same as `pixio …`."""

from pixio.cli.main import main

if __name__ == "__main__":
    main()
