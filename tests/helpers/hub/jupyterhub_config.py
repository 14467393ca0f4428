# mypy: ignore-errors
"""The configuration of RealHub's Hub, which passes ports and tokens in the environment."""

import importlib
import os
import sys

import jupyterhub
import jupyterhub.orm

# As a module of its own: the package beside it needs a newer Python than an old Hub has.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
doubles = importlib.import_module("doubles")

env = os.environ
c = get_config()  # noqa: F821

doubles.end_with_stdin()

c.JupyterHub.ip = c.JupyterHub.hub_ip = "127.0.0.1"
c.JupyterHub.port = int(env["REAL_HUB_PUBLIC_PORT"])  # announced only: nothing listens there
c.JupyterHub.hub_port = int(env["REAL_HUB_PORT"])
c.JupyterHub.spawner_class = doubles.DoubleSpawner
c.JupyterHub.proxy_class = doubles.DoubleProxy
c.Proxy.should_start = False
c.JupyterHub.authenticator_class = doubles.DoubleAuthenticator
c.JupyterHub.db_url = "sqlite:///jupyterhub.sqlite"

# Servers outlive the Hub, named ones are allowed, and any number may start at once.
c.JupyterHub.cleanup_servers = False
c.JupyterHub.allow_named_servers = bool(env["REAL_HUB_NAMED_SERVERS"])
c.JupyterHub.concurrent_spawn_limit = 0
c.JupyterHub.last_activity_interval = 24 * 3600
c.Spawner.poll_interval = 0
c.Spawner.apply_user_options = lambda spawner, user_options: None  # DoubleSpawner reads them
c.Spawner.start_timeout = c.Spawner.http_timeout = 120
c.JupyterHub.tornado_settings = {
    "slow_spawn_timeout": 0,  # POST answers 202 at once
    "slow_stop_timeout": float(env["REAL_HUB_SLOW_STOP_TIMEOUT"]),
}

tokens = {
    "admin": env["REAL_HUB_ADMIN_TOKEN"],
    "culler": env["REAL_HUB_CULLER_TOKEN"],
    "user-culler": env["REAL_HUB_USER_CULLER_TOKEN"],
}
c.JupyterHub.services = [{"name": name, "api_token": token} for name, token in tokens.items()]
jupyterhub.orm.APIToken.rounds = 1  # of hashing: 16,384 take 5 ms of each request

if jupyterhub.version_info < (0, 8):  # it finds this configurable-http-proxy up
    c.JupyterHub.proxy_api_ip = "127.0.0.1"
    c.JupyterHub.proxy_api_port = doubles.DoubleSpawner.port

if jupyterhub.version_info < (0, 7):  # no services: their tokens are a user's
    c.JupyterHub.api_tokens = dict.fromkeys(tokens.values(), env["REAL_HUB_TOKEN_OWNER"])
    c.Authenticator.admin_users = {env["REAL_HUB_TOKEN_OWNER"]}

if jupyterhub.version_info >= (1, 1):
    c.JupyterHub.init_spawners_timeout = -1

if jupyterhub.version_info < (2,):
    for service in c.JupyterHub.services:
        service["admin"] = True
else:
    culler_scopes = ["list:users", "read:users:activity", "read:servers", "delete:servers"]
    c.JupyterHub.load_roles = [
        {"name": "admin", "services": ["admin"]},
        {"name": "culler", "services": ["culler"], "scopes": culler_scopes},
        {"name": "user-culler", "services": ["user-culler"], "scopes": culler_scopes + ["admin:users"]},
    ]

if jupyterhub.version_info >= (5,):
    c.Authenticator.allow_all = True

exec(env["REAL_HUB_EXTRA_CONFIG"])
