"""Accept rules: one file each."""
