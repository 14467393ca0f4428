"""jupyterhub-idle-culler, made to end after a pass."""

# It only loops: its whole program, ended after the first pass, whose seconds it prints.
REFERENCE_ONCE = """
import time
import jupyterhub_idle_culler as reference
from tornado.ioloop import IOLoop

cull_idle = reference.cull_idle
failures = []

async def once(**arguments):
    began = time.perf_counter()
    try:
        await cull_idle(**arguments)
        print(time.perf_counter() - began)
    except Exception as error:
        failures.append(error)
    IOLoop.current().stop()

reference.cull_idle = once
reference.main()
if failures:
    raise failures[0]
"""
