"""Read and write files safely: bounded readers for untrusted files, pictures, locks, atomic writes, HTTP."""
