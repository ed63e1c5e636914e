"""Lambdas, closures and functions of this script as tasks, without `if __name__ == "__main__":`.

The workers never import this script. What it defines travels by value.
"""

import fdpool

factor = 3


def scaled(number):
    return number * factor


with fdpool.Pool(2) as pool:
    print("a lambda:  ", pool.submit(lambda text: text[::-1], "stressed").result())
    print("a function:", list(pool.map(scaled, range(6))))
    offset = 100
    print("a closure: ", sum(pool.map(lambda number: number + offset, range(10))))
