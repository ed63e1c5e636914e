"""A pre-fork echo server that hands each connection to the least busy of its workers.

One client is slow, and keeps a worker busy; the others are answered by the other worker meanwhile.
"""

import socket

import fdpool


def echo(connection, address):
    while line := connection.recv(1000):
        connection.sendall(line.upper())


def connect(server):
    return socket.create_connection(server.sockets[0].getsockname())


with (
    fdpool.Server(echo, bind="127.0.0.1:0", workers=2, dispatch="handoff") as server,
    connect(server) as slow,
):
    slow.sendall(b"first half, ")
    print(slow.recv(1000).decode())
    for number in range(3):
        with connect(server) as quick:
            quick.sendall(b"client %d" % number)
            print(quick.recv(1000).decode())
    slow.sendall(b"second half")
    print(slow.recv(1000).decode())
