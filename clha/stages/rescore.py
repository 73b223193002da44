CODE_VERSION = {"score": 1, "weigh": 1}
