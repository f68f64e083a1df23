"""Reading and writing files that may be a stranger's: bounded readers, pictures, locks, atomic writes."""
