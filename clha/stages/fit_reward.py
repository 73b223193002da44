CODE_VERSION = {"fit_reward": 1}
