"""One file per workflow: a config dataclass and `run(config) -> result`."""
