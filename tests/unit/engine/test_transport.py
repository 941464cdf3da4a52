import socket
import threading
from collections.abc import Iterator

import pytest

from loramux_server.engine import transport
from loramux_server.engine.frames import FrameDecoder, encode_frame
from loramux_server.engine.messages import Abort, CommandFrame, EventFrame, Shutdown, Tokens
from loramux_server.engine.transport import Channel, PeerGone


class Pair:
    def __init__(self) -> None:
        self.peer, mine = socket.socketpair()
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.peer.settimeout(10)
        self.channel = Channel(mine, epoch=3)
        self.decoder: FrameDecoder[EventFrame] = FrameDecoder(EventFrame)

    def read(self) -> list[EventFrame]:
        return self.decoder.feed(self.peer.recv(1 << 16))


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.channel.close()
    pair.peer.close()


def token(number: int) -> Tokens:
    return Tokens(request_id="r", index=0, first=number, token_ids=[number])


def test_commands_arrive_in_order_and_receive_never_blocks(pair: Pair) -> None:
    assert pair.channel.receive() == []
    frame = CommandFrame(commands=[Abort(request_id="a"), Abort(request_id="b")])
    data = encode_frame(frame) + encode_frame(CommandFrame(commands=[Shutdown()]))
    pair.peer.sendall(data[:-2])
    assert pair.channel.receive() == frame.commands
    pair.peer.sendall(data[-2:])
    pair.channel.wait(10)
    assert pair.channel.receive() == [Shutdown()]


def test_a_laggard_gets_merged_tokens_and_none_is_lost(pair: Pair) -> None:
    count = 20000
    for number in range(count):
        pair.channel.send([token(number)])
    assert not pair.channel.flushed
    frames: list[EventFrame] = []
    received: list[int] = []
    while len(received) < count:
        pair.channel.flush()
        for frame in pair.read():
            assert frame.epoch == 3 and frame.step == len(frames)
            frames.append(frame)
            received += [i for event in frame.events if isinstance(event, Tokens) for i in event.token_ids]
    assert received == list(range(count))
    assert len(frames) < count / 10
    assert pair.channel.flushed


def test_a_backlog_beyond_the_bound_is_congestion(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_BACKLOG_UNITS", 1000)
    number = 0
    while not pair.channel.congested:
        pair.channel.send([token(number)])
        number += 1
        assert number < 100000
    while not pair.channel.flushed:
        pair.read()
        pair.channel.flush()
    assert not pair.channel.congested


def test_wait_ends_when_the_peer_reads_again(pair: Pair) -> None:
    number = 0
    while pair.channel.flushed:
        pair.channel.send([token(number)])
        number += 1
    reader = threading.Timer(0.05, lambda: pair.peer.recv(1 << 16))
    reader.start()
    pair.channel.wait(10)
    reader.join()
    pair.channel.flush()


def test_end_of_file_is_the_peers_death(pair: Pair) -> None:
    pair.peer.close()
    pair.channel.wait(None)
    with pytest.raises(PeerGone):
        pair.channel.receive()
    with pytest.raises(PeerGone):
        pair.channel.send([token(0)])
