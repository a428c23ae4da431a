"""When things run: everything that talks to Prefect."""
