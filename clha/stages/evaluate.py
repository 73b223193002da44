CODE_VERSION = {"answers": 1, "evaluate": 1}
