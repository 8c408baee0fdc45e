"""Whole networks: thin assemblies of mlcore.nn with a config on top. Import the one that you need."""
