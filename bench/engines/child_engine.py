"""Inside the engine's process: takes orders from the tool, runs the engine, sends what happened."""

from __future__ import annotations

import faulthandler
import importlib
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from typing import Any, NoReturn

from bench.engines.base import Engine
from bench.engines.child import READY_SIGNAL
from bench.engines.failures import failure_of
from bench.engines.outbox import Outbox
from bench.engines.packing import unpack
from bench.engines.processes import descendants
from bench.engines.watch import ProcessWatch
from bench.engines.wire import Channel, Failure, RunOrder
from bench.errors import BenchError, EngineUnavailable

#: Engine kind -> module with ``build(launch: EngineLaunch) -> Engine``. To add an engine: one file and one line here.
ENGINE_MODULES = {
    "vllm": "bench.engines.vllm_inprocess",
    "vllm_server": "bench.engines.vllm_server",
    "endpoint": "bench.engines.endpoint",
    "simulated": "bench.engines.simulated",
    "null": "bench.engines.null",
}

_Message = tuple[str, Any]


def serve(fd: int) -> NoReturn:
    """The engine process's whole life. Never returns."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # the tool asks for the stacks of a hung engine
    channel = Channel(socket.socket(fileno=fd))
    status = 1
    try:
        status = _serve(channel)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # not sys.exit: handlers of half-closed engines must not keep this process


def _serve(channel: Channel) -> int:
    channel.send("hello", os.getpid())
    orders: queue.Queue[_Message] = queue.Queue()
    outbox = Outbox(channel)
    threading.Thread(target=_listen, args=(channel, orders, outbox), name="orders", daemon=True).start()
    kind, launch = orders.get()
    if kind != "start":
        return 0
    try:
        engine = _build(launch)
        engine.__enter__()
    except BaseException as e:
        traceback.print_exc()
        sys.stderr.flush()
        channel.send("failed", failure_of(e, starting=True))
        return 1
    outbox.report_processes()

    def overdue(failure: Failure) -> None:
        """A process of the engine has ended, and the engine itself has not noticed."""
        try:
            outbox.flush()
            channel.send("failed", failure)
        finally:
            os._exit(1)

    watch = ProcessWatch(descendants(os.getpid()), overdue)
    os.kill(os.getppid(), READY_SIGNAL)
    channel.send("ready", engine.info())
    try:
        while True:
            kind, value = orders.get()
            if kind == "stop":
                return 0
            if kind == "run" and not _run(engine, value, channel, outbox, watch):
                return 1
    finally:
        watch.close()
        outbox.close()
        engine.__exit__(None, None, None)


def _build(launch: Any) -> Engine:
    if launch.kind not in ENGINE_MODULES:
        raise EngineUnavailable(f'unknown engine kind "{launch.kind}"', next_step=f"known: {', '.join(ENGINE_MODULES)}")
    engine: Engine = importlib.import_module(ENGINE_MODULES[launch.kind]).build(launch)
    return engine


def _run(engine: Engine, order: RunOrder, channel: Channel, outbox: Outbox, watch: ProcessWatch) -> bool:
    """Serve one schedule; False when the engine cannot be used any more."""
    outbox.begin(order.number)
    records = engine.run(unpack(order.schedule), outbox, order.t0_monotonic_s)
    try:
        for record in records:
            outbox.add_record(record)
            if outbox.cancelled.is_set():
                close = getattr(records, "close", None)
                if close is not None:
                    close()
                break
        outbox.flush()
        channel.send("done", order.number)
    except BenchError as e:
        outbox.flush()
        channel.send("refused", (order.number, e))
    except BaseException as e:
        traceback.print_exc()
        sys.stderr.flush()
        outbox.flush()
        channel.send("failed", watch.why() or failure_of(e, starting=False))
        return False
    return True


def _listen(channel: Channel, orders: queue.Queue[_Message], outbox: Outbox) -> None:
    """Read orders as they come, so that an abort is heard while a run goes on."""
    while True:
        messages = channel.receive()
        if messages is None:
            os._exit(1)  # the tool is gone; the guardian ends the rest
        for kind, value in messages:
            if kind == "abort":
                outbox.cancelled.set()
                continue
            if kind == "stop":
                outbox.cancelled.set()
            orders.put((kind, value))
