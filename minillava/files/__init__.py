"""Reading and writing files, and what can be wrong with them. No module of this folder knows a
model."""
