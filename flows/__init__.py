"""The chain as Prefect flows, and the command line. Thin: everything that computes lives in `clha`."""
