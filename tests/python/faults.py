"""A TCP relay in front of an engine, which can be made to hang or to reset its connections."""

import asyncio
import socket
import struct
import threading


class Relay:
    """Relays TCP to `target` (host:port) on a port of its own, in a thread of its own."""

    def __init__(self, target: str):
        self.target = target.rsplit(":", 1)
        self.writers = set()
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()
        self.thread = threading.Thread(target=self.run, args=(ready,), daemon=True)
        self.thread.start()
        ready.wait()

    def run(self, ready):
        asyncio.set_event_loop(self.loop)
        self.go_on = asyncio.Event()
        self.go_on.set()
        server = self.loop.run_until_complete(asyncio.start_server(self.serve, "127.0.0.1", 0))
        self.address = "127.0.0.1:%d" % server.sockets[0].getsockname()[1]
        ready.set()
        self.loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()

    async def serve(self, reader, writer):
        try:
            up_reader, up_writer = await asyncio.open_connection(*self.target)
        except OSError:
            return writer.close()
        for one in (writer, up_writer):
            one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.writers |= {writer, up_writer}
        await asyncio.gather(self.pump(reader, up_writer), self.pump(up_reader, writer))
        self.writers -= {writer, up_writer}

    async def pump(self, reader, writer):
        try:
            while data := await reader.read(1 << 16):
                await self.go_on.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    def hang(self, hangs: bool):
        """Connections are accepted and nothing passes, or everything does again."""
        act = self.go_on.clear if hangs else self.go_on.set
        self.loop.call_soon_threadsafe(act)

    def reset(self):
        """Every open connection ends with RST."""

        def act():
            for writer in list(self.writers):
                linger = struct.pack("ii", 1, 0)
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()

        self.loop.call_soon_threadsafe(act)

    def stop(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
