"""Reconstruction: layers that consume units are refitted on data once some of these units are masked."""
