CODE_VERSION = {"generate": 1}
