"""Programs that train an agent of another library, or of none, on the environment.

`cleanrl_ppo.py`, `torchrl_ppo.py`; `optuna_pg.py` looks for the arguments of our own `pg`.
"""
