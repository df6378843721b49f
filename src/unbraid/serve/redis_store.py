"""The history store on a Redis server (https://redis.io), which several machines may share.

Every call is one Lua script, which Redis runs alone: an append of many events is there whole or not at all, and an id that
is known is no news however often it is sent.  A user has four keys (``{p}`` is the prefix):

    {p}u:USER  hash        generation, seq of the newest arrival
    {p}v:USER  hash        arrival -> "time,[id, table, values]"
    {p}e:USER  sorted set  8 bytes of time + 2^63 and 8 of arrival, big-endian, all of score 0: Redis then orders by
                           bytes, exactly; as scores, times would be doubles of 53 bits
    {p}i:USER  set         digests of ids

and the store has ``{p}users`` (a sorted set of 16 hexadecimal digits), ``{p}settings`` and ``{p}state`` (number of events, newest
generation, what run of the server was seen last).  The keys of a script are made inside it, so this is for one server and its
replicas, not for a cluster.

What an acknowledged append survives is the server's setting (`RedisStore.durability`).  A server that restarts may have lost
the newest arrivals and give their numbers to others; so every connection first tells the store which run of the server it
sees, and a new one gives all users a new generation.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unbraid.serve.store import (
    BIAS,
    FORMAT,
    FORMAT_KEY,
    Contents,
    Page,
    Record,
    StoreCorrupt,
    StoreDown,
    StoreError,
    StoreFull,
    check_count,
    check_user,
    encoded,
    public,
    time_key,
)

MOST = 50_000  # events of one append: the server does nothing else meanwhile
# Numbers of Lua are doubles, exact up to 2^53: microseconds since 1970 reach that in the year 2255.  Users and times pass as
# text.
_COMMON = """
local p = ARGV[1]
local function next_generation()
  local now = redis.call('TIME')
  local held = tonumber(redis.call('HGET', p..'state', 'epoch') or '0')
  local epoch = math.max(held + 1, now[1] * 1000000 + now[2])
  redis.call('HSET', p..'state', 'epoch', string.format('%.0f', epoch))
  return string.format('%.0f', epoch)
end
local function values(user, seqs, out)
  for i = 1, #seqs, 1000 do
    local part = {unpack(seqs, i, math.min(i + 999, #seqs))}
    local found = redis.call('HMGET', p..'v:'..user, unpack(part))
    for j = 1, #part do
      if found[j] then out[#out + 1] = '['..part[j]..','..found[j]..']' end
    end
  end
  return '['..table.concat(out, ',')..']'
end
local function arrivals(keys)
  local seqs = {}
  for i = 1, #keys do seqs[i] = string.format('%.0f', struct.unpack('>I8', keys[i], 9)) end
  return seqs
end
"""
_SCRIPTS = {
    "seen": """
local format = redis.call('HGET', p..'settings', ARGV[3])
if not format then
  if redis.call('EXISTS', p..'users') == 1 then return '' end
  redis.call('HSET', p..'settings', ARGV[3], ARGV[4])
elseif format ~= ARGV[4] then
  return format
end
if redis.call('HGET', p..'state', 'run') ~= ARGV[2] then
  redis.call('HSET', p..'state', 'era', next_generation(), 'run', ARGV[2])
end
return ARGV[4]
""",
    "append": """
local new, fresh = {}, 0
for i = 2, #ARGV, 5 do
  local user, hex, digest, time, value = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  local added = redis.call('SADD', p..'i:'..user, digest)
  if added == 1 then
    local seq = redis.call('HINCRBY', p..'u:'..user, 'seq', 1)
    if seq == 1 then
      redis.call('HSET', p..'u:'..user, 'generation', next_generation())
      redis.call('ZADD', p..'users', 0, hex)
    end
    redis.call('HSET', p..'v:'..user, string.format('%.0f', seq), value)
    redis.call('ZADD', p..'e:'..user, 0, time..struct.pack('>I8', seq))
    fresh = fresh + 1
  end
  new[#new + 1] = added
end
if fresh > 0 then redis.call('HINCRBY', p..'state', 'events', fresh) end
return new
""",
    "read": """
local user, after = ARGV[2], tonumber(ARGV[4])
local held = redis.call('HMGET', p..'u:'..user, 'generation', 'seq')
if not held[1] then return {'0', '0', 1, '[]'} end
local era = redis.call('HGET', p..'state', 'era') or '0'
local generation = string.format('%.0f', math.max(tonumber(held[1]), tonumber(era)))
local seq, out = tonumber(held[2]), {}
if generation == ARGV[3] and after > 0 and after <= seq then
  local seqs = {}
  for s = after + 1, seq do seqs[#seqs + 1] = string.format('%.0f', s) end
  return {generation, held[2], 0, values(user, seqs, out)}
end
local all = redis.call('HGETALL', p..'v:'..user)
for i = 1, #all, 2 do out[#out + 1] = '['..all[i]..','..all[i + 1]..']' end
return {generation, held[2], 1, '['..table.concat(out, ',')..']'}
""",
    "last": """
local user, n, keys = ARGV[2], ARGV[3], nil
if ARGV[4] == '' then
  keys = redis.call('ZRANGE', p..'e:'..user, '-'..n, -1)
else
  keys = redis.call('ZREVRANGEBYLEX', p..'e:'..user, '('..ARGV[4], '-', 'LIMIT', 0, n)
end
return values(user, arrivals(keys), {})
""",
    "contents": """
local user = ARGV[2]
local held = redis.call('HMGET', p..'u:'..user, 'generation', 'seq')
return {redis.call('ZSCORE', p..'users', ARGV[3]) and held[1] and 1 or 0, held[2] or '0', redis.call('HGETALL', p..'v:'..user),
        redis.call('ZRANGE', p..'e:'..user, 0, -1), redis.call('SMEMBERS', p..'i:'..user)}
""",
    "trim": """
local user = ARGV[2]
local extra = redis.call('ZCARD', p..'e:'..user) - tonumber(ARGV[3])
if extra <= 0 then return 0 end
local seqs = arrivals(redis.call('ZRANGE', p..'e:'..user, 0, extra - 1))
for i = 1, #seqs, 1000 do
  redis.call('HDEL', p..'v:'..user, unpack(seqs, i, math.min(i + 999, #seqs)))
end
redis.call('ZREMRANGEBYRANK', p..'e:'..user, 0, extra - 1)
redis.call('HSET', p..'u:'..user, 'generation', next_generation())
redis.call('HINCRBY', p..'state', 'events', -extra)
return extra
""",
    "delete": """
local user = ARGV[2]
local count = redis.call('ZCARD', p..'e:'..user)
redis.call('UNLINK', p..'u:'..user, p..'v:'..user, p..'e:'..user, p..'i:'..user)
redis.call('ZREM', p..'users', ARGV[3])
if count > 0 then redis.call('HINCRBY', p..'state', 'events', -count) end
next_generation()
return count
""",
}


class RedisStore:
    """A history store on a Redis server.

    Args:
        url: ``redis://HOST:PORT/N``, ``rediss://...`` or ``unix://PATH``, with name and password where it asks for them.
        timeout: seconds that connecting, and an answer, may take.
        prefix: of all keys, so that a server may hold other things, too.

    Raises:
        StoreDown: the server does not answer; StoreCorrupt: another version wrote what is there; StoreError: it would evict
        events when its memory is full; ImportError: redis-py is missing; ValueError: the URL is not one.
    """

    def __init__(self, url: str, *, timeout: float = 2.0, prefix: str = "unbraid:") -> None:
        self._redis = redis = library()
        self.prefix, self._closed = prefix, False
        try:
            self._client = redis.Redis.from_url(
                url, socket_timeout=timeout, socket_connect_timeout=timeout, redis_connect_func=self._connected,
                retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),  # a caller that repeats an append learns what was new
            )  # fmt: skip
        except ValueError as error:
            why = "" if public(url).endswith("...") else f": {error}"  # it would say parts of a password
            raise ValueError(
                f"{public(url)} is not an address of Redis{why}. `@`, `/`, `?` and `#` in a password are written %40, %2F, %3F "
                "and %23."
            ) from None
        self.address = public(url)
        self._scripts = {name: self._client.register_script(_COMMON + text) for name, text in _SCRIPTS.items()}
        try:
            self.ready()
            memory = self._ask(self._client.info, "memory")
            if memory.get("maxmemory", 0) and str(memory.get("maxmemory_policy")).startswith("allkeys"):
                raise StoreError(
                    f"{self.address}: it would evict events when its memory is full ({memory['maxmemory_policy']}). "
                    "Set `maxmemory-policy noeviction` there."
                )
            self.durability = self._durability()
        except BaseException:
            self.close()
            raise

    def append(self, events: Sequence[tuple[int, Record]]) -> list[bool]:
        """See `Store`."""
        if len(events) > MOST:
            raise ValueError(f"A script of Redis takes at most {MOST:,} events at once. Found {len(events):,}.")
        arguments: list[Any] = []
        for user, record in events:
            number, digest, time, payload = encoded(user, record)
            arguments += [number, f"{number:016x}", digest, time, b"%d,%b" % (record.time, payload)]
        return [bool(new) for new in self._run("append", *arguments)] if arguments else []

    def read(self, user: int, generation: int = 0, after: int = 0) -> Page:
        """See `Store`."""
        now, seq, whole, found = self._run("read", check_user(user), generation, check_count("after", after))
        return Page(int(now), int(seq), self._records(found), bool(whole))

    def last(self, user: int, n: int, before: int | None = None) -> list[Record]:
        """See `Store`."""
        user, n, end = check_user(user), check_count("n", n), b"" if before is None else time_key(before)
        return self._records(self._run("last", user, n, end)) if n else []

    def trim(self, user: int, keep: int) -> int:
        """See `Store`."""
        return int(self._run("trim", check_user(user), check_count("keep", keep)))

    def delete(self, user: int) -> int:
        """See `Store`."""
        return int(self._run("delete", check_user(user), f"{user:016x}"))

    def users(self) -> Iterator[int]:
        """See `Store`."""
        start, chunk = "-", 1000
        while start:
            found = self._ask(self._client.zrangebylex, self.prefix + "users", start, "+", 0, chunk)
            yield from (int(user, 16) for user in found)
            start = "(" + found[-1].decode() if len(found) == chunk else ""

    def contents(self) -> Iterator[Contents]:
        """See `Store`."""
        kept = set(self.users())
        for kind in "uvei":
            start = f"{self.prefix}{kind}:"
            cursor = 0
            while True:
                cursor, keys = self._ask(self._client.scan, cursor, re.sub(r"([*?\[\]\\])", r"\\\1", start) + "*", 1000)
                kept.update(int(name) for key in keys if (name := key[len(start.encode()) :]).isdigit())
                if not cursor:
                    break
        for user in sorted(kept):
            yield self._contents(user)

    def _contents(self, user: int) -> Contents:
        listed, seq, values, keys, ids = self._run("contents", user, f"{user:016x}")
        try:
            events = []
            for arrival, text in zip(values[::2], values[1::2], strict=True):
                time, _, payload = text.partition(b",")
                events.append((int(time), int(arrival), payload))
            index = {n: t - BIAS for t, n in (struct.unpack(">QQ", key) for key in keys)}
            return Contents(user, bool(listed), None, int(seq), events, index, set(ids))
        except (ValueError, struct.error) as error:
            raise StoreCorrupt(f"{self.address}: a key of user {user} is damaged ({error}).") from error

    def get(self, name: str) -> str | None:
        """See `Store`."""
        found = self._ask(self._client.hget, self.prefix + "settings", name)
        return None if found is None else found.decode()

    def set(self, name: str, text: str) -> None:
        """See `Store`."""
        self._ask(self._client.hset, self.prefix + "settings", name, text)

    def stats(self) -> Mapping[str, int]:
        """See `Store`."""
        users = self._ask(self._client.zcard, self.prefix + "users")
        events = int(self._ask(self._client.hget, self.prefix + "state", "events") or 0)
        return {"users": users, "events": events, "bytes": self._ask(self._client.info, "memory")["used_memory"]}

    def ready(self) -> None:
        """See `Store`."""
        self._ask(self._client.ping)

    def close(self) -> None:
        """See `Store`."""
        self._closed = True
        self._client.close()

    def _durability(self) -> str:
        """What survives a crash, in words."""
        if not self._ask(self._client.info, "persistence").get("aof_enabled"):
            return "events since the server's last snapshot are lost when it stops hard: set `appendonly yes` there"
        try:
            policy = self._ask(self._client.config_get, "appendfsync").get("appendfsync")
        except StoreError:  # some hosts keep CONFIG to themselves
            return "an append-only file, whose `appendfsync` this user may not see"
        if policy == "always":
            return "every event whose append returned"
        lost = "the last second" if policy == "everysec" else "what the system had not written"
        return f"every event whose append returned, but {lost} when the machine crashes (appendfsync {policy})"

    # ------------------------------------------------------------------------------------------------------- the server
    def _connected(self, connection: Any) -> None:
        """Of every new connection: which run of the server is this, and is what it holds ours?"""
        connection.on_connect()
        connection.send_command("INFO", "server")
        about = dict(line.split(":", 1) for line in _text(connection.read_response()).splitlines() if ":" in line)
        text = _COMMON + _SCRIPTS["seen"]
        connection.send_command("EVAL", text, 0, self.prefix, about["run_id"], FORMAT_KEY, FORMAT)
        found = _text(connection.read_response())
        if found != FORMAT:
            raise StoreCorrupt(
                f"Redis, keys {self.prefix}*: a store of format {found or 'unknown'}; this version reads {FORMAT}. Use the "
                "version that wrote it, or import the events again into another database."
            )

    def _run(self, script: str, *arguments: Any) -> Any:
        return self._ask(self._scripts[script], (), (self.prefix, *arguments))

    def _ask(self, call: Any, *arguments: Any) -> Any:
        """What the server answers; its errors as those of a store."""
        errors = self._redis.exceptions
        if self._closed:
            raise StoreError(f"The store {self.address} is closed. Open it again.")
        try:
            return call(*arguments)
        except errors.AuthenticationError as error:
            raise StoreError(f"{self.address}: {error}. Put name and password into the address.") from error
        except errors.ResponseError as error:
            text = str(error)
            if isinstance(error, errors.OutOfMemoryError) or "OOM" in text or "MISCONF" in text:
                raise StoreFull(f"{self.address}: no room for a write ({text}). Make room on the server.") from error
            if isinstance(error, errors.ReadOnlyError) or text.startswith(
                ("READONLY", "LOADING", "BUSY", "MASTERDOWN")
            ):
                raise StoreDown(f"{self.address}: {text}.") from error
            raise StoreError(f"{self.address}: {text}.") from error
        except (errors.ConnectionError, errors.TimeoutError, OSError) as error:
            raise StoreDown(f"{self.address} does not answer ({error}). Start it, or look at the network.") from error
        except errors.RedisError as error:
            raise StoreError(f"{self.address}: {error}.") from error

    def _records(self, found: bytes) -> list[Record]:
        """Records of a JSON list of (arrival, time, [id, table, values]), by (time, arrival)."""
        try:
            rows = sorted(json.loads(found), key=lambda row: (row[1], row[0]))
            return [Record(i, time, table, values) for _, time, (i, table, values) in rows]
        except (ValueError, TypeError) as error:
            raise StoreCorrupt(f"{self.address}: an event is damaged ({error}). Import the events again.") from error


def library() -> Any:
    """The package; raises ImportError with a hint."""
    try:
        import redis
        import redis.backoff
        import redis.retry
    except ImportError as error:
        raise ImportError('A history store on Redis needs redis-py: pip install "unbraid[serve]".') from error
    return redis


def _text(answer: Any) -> str:
    return answer.decode() if isinstance(answer, bytes) else str(answer)
