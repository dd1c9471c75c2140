"""The same numbers sooner. The files of the reading order do not need this folder to be
understood."""
