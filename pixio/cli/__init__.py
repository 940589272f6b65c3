"""The command line: `pixio …`."""
