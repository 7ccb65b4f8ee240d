"""Shards, replicas and FSDP: the only place that knows ``DTensor``."""
