"""`python -m sap_fast.cli` is `sap-fast`."""

from sap_fast.cli import main

main()
