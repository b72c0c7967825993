"""Devices: the mesh, which part of an array lies where, and the start on several hosts."""
