"""A reward of your own for the controller: how far the signal fell, less a price on what was shown (docs/factories.md).

credit: {reward: "own_reward:make", reward_settings: {price: 0.02}}
"""


def make(price=0.0):
    """Called once, with credit.reward_settings."""

    def reward(finished):
        """A number for a decision whose window has closed; one that is not finite drops the decision."""
        measured = [value for value in finished.progress_signal if value is not None]
        return measured[0] - measured[-1] - price * finished.effective_ratio

    return reward
