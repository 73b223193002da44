CODE_VERSION = {"prepare": 1}
