"""An accepted connection, handed to a worker that answers it.

This process only accepts. Once `submit` has returned it closes its own copy of the connection, and the
worker's is the last: when the task is done with it, the peer sees the end.
"""

import socket

import fdpool


def answer(connection):
    """Runs in a worker: take over the conversation."""
    with connection, connection.makefile() as requests:
        request = requests.readline()
        connection.sendall(f"you said: {request}".encode())
        return len(request)


with socket.create_server(("127.0.0.1", 0)) as listener, fdpool.Pool(2) as pool:
    # Two peers, in this same process for the example's sake.
    peers = [socket.create_connection(listener.getsockname()) for _ in range(2)]
    for peer, name in zip(peers, ("first", "second")):
        peer.sendall(f"hello from the {name}\n".encode())

    futures = []
    for _ in peers:
        connection, _address = listener.accept()
        with connection:
            futures.append(pool.submit(answer, connection))

    for peer in peers:
        with peer, peer.makefile() as replies:
            print(replies.read(), end="")
    print("characters read by the workers:", [future.result() for future in futures])
