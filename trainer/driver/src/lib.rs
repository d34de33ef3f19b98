//! The reinforcement-learning loop of the one process that commands worker groups.
