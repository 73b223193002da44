CODE_VERSION = {"train": 1}
