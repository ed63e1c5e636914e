"""Share a large table with many tasks: it is put into memory once, and made once in each worker."""

from functools import partial

import fdpool


def price(table, basket):
    return sum(table[article] for article in basket)


table = {f"article {n}": n % 97 for n in range(100_000)}
baskets = [[f"article {n * k}" for k in range(1, 6)] for n in range(1000)]
with fdpool.Pool(2) as pool, pool.share(table) as shared:
    prices = list(pool.map(partial(price, shared), baskets))
print(f"{len(prices)} baskets, {sum(prices)} in all, the first {prices[:3]}")
