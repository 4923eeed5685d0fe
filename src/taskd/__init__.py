"""taskd: a systemd-native service that runs work for messages."""

__version__ = "0.1.0"
