# mypy: ignore-errors
"""What the Hub of the tests loads in place of processes, a proxy, a login page and the past.

Runs inside Hubs 0.6 to 6, so on Python 3.6 and tornado 4 too.
"""

import contextlib
import datetime
import json
import os
import signal
import ssl
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn
from weakref import WeakSet

import jupyterhub
from jupyterhub import orm
from jupyterhub.apihandlers.base import APIHandler
from jupyterhub.auth import Authenticator
from jupyterhub.spawner import Spawner
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.orm import object_session
from tornado import gen, web
from tornado.locks import Event

try:
    from jupyterhub.proxy import Proxy
except ImportError:  # Hubs before 0.8 know configurable-http-proxy only: see Server
    Proxy = object


def put_into_past(row, ages):
    """Set each of a row's columns to that many seconds ago; None leaves the column alone.

    Commit it: at the end of any request the Hub rolls back what is not.
    """
    now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)  # as the database's
    for column, seconds in ages.items():
        if seconds is not None and hasattr(row, column):  # Hubs before 0.9 have last_activity only
            setattr(row, column, now - datetime.timedelta(seconds=seconds))


def touch(user, server="", last_activity=0):
    """A server was active, and so was its user: but that never makes the user idle. Hubs before 0.9 know users only."""
    seen = {"last_activity": last_activity}
    if jupyterhub.version_info < (0, 9):
        put_into_past(user, seen)
    else:
        spawner = user.orm_spawners[server]
        put_into_past(spawner, seen)
        if user.last_activity is None or user.last_activity < spawner.last_activity:
            put_into_past(user, seen)
    object_session(user).commit()


def in_background(work):
    thread = threading.Thread(target=work)
    thread.daemon = True
    thread.start()


@event.listens_for(Engine, "connect")
def do_not_wait_for_the_disk(connection, record):
    """The database need not outlive the machine; a quarter of a Hub's time would go into it."""
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA journal_mode = MEMORY")


def end_with_stdin():
    """Ends the Hub when the process that started it is gone, however that one ended."""

    def wait():
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    in_background(wait)


class Server(ThreadingMixIn, HTTPServer):
    """Stands for every user's server: answers anything, so that the Hub finds it ready.

    For Hubs before 0.8 it stands for the API of configurable-http-proxy too, and has no routes.
    """

    daemon_threads = True
    request_queue_size = 256

    class RequestHandlerClass(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.send_header("X-JupyterHub-Version", jupyterhub.__version__)
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    def __init__(self, port):
        super().__init__(("127.0.0.1", port), self.RequestHandlerClass)
        in_background(self.serve_forever)

    def speak_tls(self, cert_paths):
        """From now on; with the certificate of one user, which the Hub trusts for all of them."""
        if not isinstance(self.socket, ssl.SSLSocket):
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(cert_paths["certfile"], cert_paths["keyfile"])
            self.socket = context.wrap_socket(self.socket, server_side=True)


class DoubleSpawner(Spawner):
    """Starts nothing, and does what the server's user_options say; see RealHub.spawn."""

    port = int(os.environ["REAL_HUB_SERVER_PORT"])
    double = Server(port)
    alive = WeakSet()
    stopping = most_stopping = 0  # of all of them at the same time
    running = False
    fresh = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hurried = Event()
        self.alive.add(self)

    def put_into_past(self):
        option = self.user_options.get
        age, idle = option("age_seconds"), option("idle_seconds")
        user_idle = option("user_idle_seconds")
        if age is None and idle is not None:
            age = max(idle, 0)
        if jupyterhub.version_info >= (0, 9):
            put_into_past(self.orm_spawner, {"last_activity": idle, "started": age})
        elif user_idle is None:  # a server's activity is its user's
            user_idle = idle
        user = {"last_activity": user_idle, "created": option("user_age_seconds")}
        put_into_past(self.user.orm_user, user)
        object_session(self.user.orm_user).commit()

    async def wait(self, seconds):
        with contextlib.suppress(gen.TimeoutError):
            await self.hurried.wait(datetime.timedelta(seconds=seconds))

    async def start(self):
        self.hurried.clear()
        self.put_into_past()
        if getattr(self, "internal_ssl", False):  # from Hub 1.0 on
            self.double.speak_tls(self.cert_paths)
        await self.wait(self.user_options.get("start_seconds", 0))
        self.running = self.fresh = True
        if jupyterhub.version_info < (0, 7):
            server = self.user.server
            server.ip, server.port = "127.0.0.1", self.port
            object_session(server).commit()
        return "127.0.0.1", self.port

    def add_poll_callback(self, *args, **kwargs):
        # The last step of a spawn: Hubs before 0.9 have set last_activity since start().
        super().add_poll_callback(*args, **kwargs)
        if self.fresh:
            self.put_into_past()
            self.fresh = False

    async def poll(self):
        return None if self.running else 0

    async def stop(self, now=False):
        kind = DoubleSpawner
        kind.stopping += 1
        kind.most_stopping = max(kind.stopping, kind.most_stopping)
        if "then_active" in self.user_options and not self.hurried.is_set():
            touch(orm.User.find(object_session(self.user.orm_user), self.user_options["then_active"]))
        await self.wait(self.user_options.get("stop_seconds", 0))
        kind.stopping -= 1
        self.running = False

    def get_state(self):
        state = super().get_state()
        if self.running:
            state["options"] = self.user_options  # Hubs before 1.4 do not keep them
        return state

    def load_state(self, state):
        super().load_state(state)
        self.running = "options" in state
        self.user_options = state.get("options", self.user_options)

    def clear_state(self):
        super().clear_state()
        self.running = False


class DoubleProxy(Proxy):
    """Keeps its routes in memory, and never tells the Hub of activity."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.routes = {}

    async def add_route(self, routespec, target, data):
        route = {"routespec": routespec, "target": target, "data": data}
        self.routes[self.validate_routespec(routespec)] = route

    async def delete_route(self, routespec):
        self.routes.pop(self.validate_routespec(routespec), None)

    async def get_all_routes(self):
        return dict(self.routes)


class BackdoorHandler(APIHandler):
    """What tests need of the Hub and its API cannot do; only for the token of the admin service."""

    def check_xsrf_cookie(self):
        pass

    def post(self, action):
        token = "token " + os.environ["REAL_HUB_ADMIN_TOKEN"]
        if self.request.headers.get("Authorization") != token:
            raise web.HTTPError(403)
        answer = getattr(self, "post_" + action)(**self.get_json_body())
        self.db.commit()
        self.write(json.dumps(answer))

    def orm_users(self, names):
        """Users by their names, found with one query. Who is not in the database yet is added, in this order."""
        names = list(names)
        users = {user.name: user for user in self.db.query(orm.User).filter(orm.User.name.in_(names))}
        roles = [orm.Role.find(self.db, "user")]  # which the Hub gives to all
        for name in names:
            if name not in users:
                users[name] = orm.User(name=name, roles=roles)
                self.db.add(users[name])
        return users

    def post_user(self, name, last_activity=None, created=None):
        """Each time is given in seconds before now."""
        user = self.find_user(name).orm_user
        put_into_past(user, {"last_activity": last_activity, "created": created})

    def post_server(self, name, server, last_activity):
        """Activity of a server counts as its user's too, but never makes the user idle."""
        touch(self.find_user(name).orm_user, server, last_activity)

    def post_token(self, scopes):
        """A token of the admin service with just these scopes; Hub 2 and later."""
        service = orm.Service.find(self.db, "admin")
        if jupyterhub.version_info >= (3,):
            return service.new_api_token(scopes=scopes)
        # Tokens had roles, and only roles had scopes. new_api_token(roles=...) refuses some that are fine.
        token = service.new_api_token()
        role = orm.Role(name="token-%d" % self.db.query(orm.Role).count(), scopes=scopes)
        orm.APIToken.find(self.db, token).roles = [role]
        self.db.commit()
        return token

    def post_named_servers(self, name):
        """The names of a user's named servers, stopped ones too."""
        return sorted(filter(None, self.find_user(name).orm_user.orm_spawners))

    def post_about(self):
        """The Hub's version, whether all ready servers are as old as they should be, how many were stopping at most."""
        settled = not any(spawner.fresh for spawner in DoubleSpawner.alive)
        most = DoubleSpawner.most_stopping
        return {"version": jupyterhub.version_info[:3], "settled": settled, "most_stopping": most}

    def post_run(self, servers):
        """Servers that run, as the Hub finds them when it starts anew; Hub 6 and later. Makes many at once.

        They are (name of their user, name, user_options). Users who do not exist yet are made, too.
        """
        users = self.orm_users(name for name, _, _ in servers)
        for name, server, options in servers:
            user = users[name]
            spawner = user.orm_spawners.get(server) or orm.Spawner(name=server, display_name=server, user=user)
            self.db.add(spawner)
            spawner.server = orm.Server(ip="127.0.0.1", port=DoubleSpawner.port, base_url="/")
            spawner.user_options = options or spawner.user_options or {}
            spawner.state = {"options": spawner.user_options}
            put_into_past(spawner, {"started": 0, "last_activity": 0})
            put_into_past(user, {"last_activity": 0})
        self.db.flush()
        for name, server, _ in servers:
            spawner = self.users[users[name]].spawners[server]  # made by the Hub, from the database
            spawner.load_state(spawner.orm_spawner.state)  # if it was made before
            spawner.put_into_past()

    def post_inherit(self, users):
        """What an older Hub has left, which took names that this one refuses; Hub 6 and later. Makes many at once.

        Users are (name, seconds since their last activity, user_options of their running servers by name). A user who
        is known already is only put into the past. Returns which names of users the Hub refuses.
        """
        refused = [name for name, _, _ in users if not self.authenticator.validate_username(name)]
        users = [user for user in users if user[0] not in refused]
        orm_users = self.orm_users(name for name, _, _ in users)
        servers = []
        for name, idle_seconds, options in users:
            put_into_past(orm_users[name], {"last_activity": idle_seconds})
            if options and "" not in options:  # or the Hub would add it, one user at a time
                self.db.add(orm.Spawner(name="", display_name="", user=orm_users[name]))
            servers += [(name, server, dict(each, user_idle_seconds=idle_seconds)) for server, each in options.items()]
        self.post_run(servers)
        return refused

    def post_hurry(self):
        """Whatever waits in start or stop, or would, is done at once."""
        DoubleSpawner.most_stopping = 0
        for spawner in DoubleSpawner.alive:
            spawner.hurried.set()


class DoubleAuthenticator(Authenticator):
    """Lets everybody in; brings the backdoor, as a way in that every Hub has."""

    async def authenticate(self, handler, data):
        return data["username"]

    def get_handlers(self, app):
        return super().get_handlers(app) + [(r"/api/testing/(\w+)", BackdoorHandler)]
