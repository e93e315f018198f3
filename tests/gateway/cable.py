"""A wire to an engine that can be cut in the middle of whatever goes over it."""

import contextlib
import socket
import threading


class Cable:
    """Forwards connections on a port of its own to `address`, until it is cut."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._is_cut = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> "Cable":
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._listener.close()

    def cut(self) -> None:
        """Break every connection, and every one that is made from now on."""
        with self._lock:
            self._is_cut = True
            for end in self._open:
                _break(end)
            self._open.clear()

    def mend(self) -> None:
        """Carry connections again."""
        with self._lock:
            self._is_cut = False

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # closed: the test is over
            while True:
                here, _ = self._listener.accept()
                with self._lock:
                    if self._is_cut:
                        _break(here)
                        continue
                    try:
                        there = socket.create_connection(self._address)
                    except OSError:  # nobody is there
                        _break(here)
                        continue
                    self._open += [here, there]
                for one, other in ((here, there), (there, here)):
                    threading.Thread(target=_carry, args=(one, other), daemon=True).start()


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    _break(target)
    _break(source)


def _break(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
