"""Pages and tables made from workflow results."""
