"""The `sap-fast` command line."""
