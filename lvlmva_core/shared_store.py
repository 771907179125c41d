"""A store that several machines share: objects in an S3 bucket, and claims on what one of them is about to buy.

All of it rests on S3's conditional requests: `If-None-Match: *` puts an object only where none is, `If-Match` only in
the place of the one that was seen. Needs the extra `s3`.
"""

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from lvlmva_core.errors import InputError
from lvlmva_core.store import canonical_json

log = logging.getLogger(__name__)

CLAIM_S = 60.0  # a claim that was not renewed for so long is free; it is renewed three times as often
SLACK_S = 2.0  # the server's times have whole seconds
AT_ONCE = 16  # requests
ATTEMPTS = 4  # at each, where the connection is lost or the server is busy
CONFLICTS = 20  # answers 409, which ask to send the same again
_CLAIMS = "claims"
_PROBE = "conditional"


class UnreachableError(InputError):
    """The shared store did not answer, or refused; nothing is known about what it holds."""


class NotFreeError(Exception):
    """Somebody else holds the claim."""


@dataclass(frozen=True)
class Object:
    """An object as it stands. etag: what `If-Match` compares. age_s: since it was written, by the server's clock."""

    content: bytes
    etag: str
    age_s: float


@dataclass(frozen=True)
class Claim:
    """The right to buy one call. owner: of whose claims there can be one at a time; content, etag: as they stand."""

    kind: str
    key: str
    owner: str
    content: bytes
    etag: str


class SharedStore:
    """Objects `<prefix>/<kind>/<first two digits>/<key>.<suffix>` of a bucket, with the bytes of the local records.

    Safe to use from several threads. Its methods raise UnreachableError.
    """

    def __init__(self, url: str) -> None:
        """Open `s3://bucket/prefix`; nothing is sent yet. Credentials and endpoint are found as boto3 finds them.

        Raises:
            InputError: it is no such address, or boto3 is not installed.
        """
        parts = urlsplit(url)
        if parts.scheme != "s3":
            raise InputError(
                f"a shared store lies on S3 (s3://bucket/prefix), not on '{parts.scheme}://'; other object stores "
                "serve as DVC remotes (docs/sharing.md)"
            )
        if not parts.hostname or "@" in parts.netloc or ":" in parts.netloc or parts.query or parts.fragment:
            raise InputError("the address of a shared store is s3://bucket/prefix and nothing else; no user, no key")
        try:
            import boto3
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ImportError as error:
            raise InputError("a shared store needs boto3: pip install 'lvlmva[s3]'") from error
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        self.name = f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")
        config = Config(
            connect_timeout=5,
            read_timeout=20,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            max_pool_connections=AT_ONCE,
            # what other servers than Amazon's do not all know; records carry digests of their own
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            self._client = boto3.session.Session().client("s3", config=config)
        except (BotoCoreError, ValueError) as error:
            raise InputError(f"{self.name}: boto3 cannot be set up ({type(error).__name__}); {_CHAIN}") from None
        self._checked = False

    def get(self, kind: str, key: str, suffix: str) -> Object | None:
        """An object, or None where there is none."""
        answer = self._send("get_object", Key=self._path(kind, key, suffix))
        if answer is None:
            return None
        return Object(answer["content"], answer["ETag"], _age_s(answer))

    def put(self, kind: str, key: str, suffix: str, content: bytes, over: str | None = None) -> str | None:
        """Put an object where none is, or in the place of the one with the ETag `over`; says its ETag.

        None where that does not hold (any more). It may also mean that our own request was sent a second time, since
        the connection was lost before the first answer: who gets None looks what is there.
        """
        self._check()
        return self._put(self._path(kind, key, suffix), content, over)

    def keep(self, kind: str, key: str, suffix: str, content: bytes, is_whole: Callable[[bytes], bool]) -> bytes:
        """Put an object unless a whole one is there; says what stands: ours, or the one that was there first."""
        over = None
        while self.put(kind, key, suffix, content, over) is None:
            found = self.get(kind, key, suffix)
            if found is not None and (found.content == content or is_whole(found.content)):
                return found.content
            over = None if found is None else found.etag
        return content

    def etags(self, kind: str, suffix: str) -> dict[str, str]:
        """ETag of every object of a kind, by key; a request for each thousand."""
        self._check()
        found: dict[str, str] = {}
        more: dict[str, str] = {}
        while True:
            answer = self._send("list_objects_v2", Prefix=f"{self._path(kind)}/", **more) or {}
            for entry in answer.get("Contents", []):
                name = entry["Key"].rpartition("/")[2]
                if name.endswith(f".{suffix}"):
                    found[name.removesuffix(f".{suffix}")] = str(entry["ETag"])
            if not answer.get("IsTruncated"):
                return found
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    def claim(self, kind: str, key: str, owner: str, host: str, seconds: float | None = None) -> Claim:
        """Claim the right to buy what a key stands for; a claim of the same owner, or one that has run out, gives way.

        Args:
            owner: who keeps its own processes apart by a lock, so that an earlier claim of it belongs to a dead one.
            host: name to show to others. seconds: how long it holds without being renewed; CLAIM_S if None.

        Raises:
            NotFreeError: another owner holds it; the message says who.
        """
        lasts = CLAIM_S if seconds is None else seconds
        said = {"owner": owner, "host": host, "seconds": lasts, "nonce": secrets.token_hex(8)}
        content = canonical_json(said)
        over = None
        while (etag := self.put(_CLAIMS, key, kind, content, over)) is None:
            found = self.get(_CLAIMS, key, kind)
            if found is None:
                over = None
                continue
            if found.content == content:  # the answer to our own request was lost
                etag = found.etag
                break
            held = _read_claim(found.content)
            if held["owner"] != owner and found.age_s <= held["seconds"] + SLACK_S:
                raise NotFreeError(str(held["host"]))
            over = found.etag
        return Claim(kind, key, owner, content, etag)

    def renew(self, claim: Claim) -> Claim | None:
        """Hold a claim for its time from now on; None where it ran out and somebody else took it."""
        content = canonical_json({**json.loads(claim.content), "nonce": secrets.token_hex(8)})
        etag = self.put(_CLAIMS, claim.key, claim.kind, content, claim.etag)
        if etag is None:
            found = self.get(_CLAIMS, claim.key, claim.kind)
            if found is None or found.content != content:
                return None
            etag = found.etag
        return Claim(claim.kind, claim.key, claim.owner, content, etag)

    def release(self, claim: Claim, *, bought: bool) -> None:
        """Let go of a claim. bought: the record stands, so that whoever claims the key next finds it."""
        if bought:
            self._send("delete_object", Key=self._path(_CLAIMS, claim.key, claim.kind))
        else:  # not deleted: it might be another's by now
            free = canonical_json({**json.loads(claim.content), "seconds": -SLACK_S - 1})
            self.put(_CLAIMS, claim.key, claim.kind, free, claim.etag)

    def exchange(
        self,
        kind: str,
        suffix: str,
        keys: Iterable[str],
        ours: Callable[[str], bytes | None],
        take: Callable[[str, bytes], None],
        *,
        put: bool = True,
    ) -> dict[str, str]:
        """Make both sides hold the same records of these keys: ours go there, and what stands there comes here.

        Where both have one and they differ, the shared store's stands.

        Args:
            ours: bytes of our record, or None. take: keeps bytes in the place of ours; raises ValueError where they are
                damaged. put: whether ours go there.

        Returns:
            key -> "same", "put" there, "taken" from there, "damaged" there, or "absent" there (and here, or not `put`).
        """
        asked = list(dict.fromkeys(keys))
        there = self.etags(kind, suffix) if asked else {}

        def meet(key: str) -> str:
            own, etag = ours(key), there.get(key)
            if own is not None and etag is not None and etag.strip('"') == _md5(own):
                return "same"
            outcome = "absent"
            if etag is not None and (found := self.get(kind, key, suffix)) is not None:
                if found.content == own:
                    return "same"
                if self._take(kind, key, found.content, take):
                    return "taken"
                outcome = "damaged"
            if own is None or not put:
                return outcome
            stands = self.keep(kind, key, suffix, own, lambda content: self._take(kind, key, content, take))
            return "put" if stands == own else "taken"

        with ThreadPoolExecutor(AT_ONCE) as threads:
            return dict(zip(asked, threads.map(meet, asked), strict=True))

    def _take(self, kind: str, key: str, content: bytes, take: Callable[[str, bytes], None]) -> bool:
        try:
            take(key, content)
        except ValueError as error:
            log.warning(f"warning: {self.name}: {kind} {key[:12]} is damaged there ({str(error)[:200]}); left out")
            return False
        return True

    def _path(self, *parts: str) -> str:
        if len(parts) == 3:
            kind, key, suffix = parts
            parts = (kind, key[:2], f"{key}.{suffix}")
        return "/".join([*([self.prefix] if self.prefix else []), *parts])

    def _check(self) -> None:
        """See once that the server keeps to conditions: one that ignores them would overwrite what was paid."""
        if self._checked:
            return
        path = self._path(_PROBE)
        first = self._put(path, b"", None)
        again = None if first is None else self._put(path, b"", None)
        if again is not None or self._put(path, b"", '"0"') is not None:
            raise UnreachableError(
                f"{self.name}: the server ignores If-None-Match or If-Match, without which two machines would "
                f"overwrite each other's answers; use a server that has conditional writes, {UNSET}"
            )
        self._checked = True

    def _put(self, path: str, content: bytes, over: str | None) -> str | None:
        condition = {"IfNoneMatch": "*"} if over is None else {"IfMatch": over}
        for _ in range(CONFLICTS):
            answer = self._send("put_object", Key=path, Body=content, **condition)
            if answer is None:
                return None
            if answer.get("conflict") is None:
                return str(answer["ETag"])
            time.sleep(0.05 + 0.2 * secrets.randbelow(1000) / 1000)
        raise UnreachableError(f"{self.name}: another write to the same object is always under way; try again, {UNSET}")

    def _send(self, operation: str, **asked: Any) -> dict[str, Any] | None:
        """The answer to a request, a body as "content"; None where no such object is or a condition does not hold."""
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            IncompleteReadError,
            NoCredentialsError,
            PartialCredentialsError,
            ResponseStreamingError,
        )
        from urllib3.exceptions import ProtocolError

        for left in range(ATTEMPTS - 1, -1, -1):
            try:
                answer: dict[str, Any] = getattr(self._client, operation)(Bucket=self.bucket, **asked)
                if operation == "get_object":
                    answer["content"] = answer["Body"].read()
                return answer
            except ClientError as error:
                return self._refused(error.response)
            except (NoCredentialsError, PartialCredentialsError):
                raise UnreachableError(f"{self.name}: no credentials; {_CHAIN}") from None
            except (BotoCoreError, ProtocolError) as error:
                # boto3 asks again where an answer fails to begin, not where it breaks off
                broke_off = isinstance(error, (ProtocolError, ResponseStreamingError, IncompleteReadError))
                if left and broke_off:
                    continue
                # without their words, which may hold an address with a password in it
                reason = type(error).__name__
                raise UnreachableError(
                    f"{self.name} cannot be reached ({reason}); mend the connection, {UNSET}"
                ) from None
        raise AssertionError("unreachable")

    def _refused(self, answer: dict[str, Any]) -> dict[str, Any] | None:
        """What an error of the server means: a conflict, None as for `_send`, or that the store is of no use."""
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = str(answer.get("Error", {}).get("Code", ""))[:80]
        if status == 409:
            return {"conflict": code}
        if status == 412 or (status == 404 and code != "NoSuchBucket"):
            return None
        if code == "NoSuchBucket":
            raise UnreachableError(f"{self.name}: no such bucket; create it, or set the address right")
        raise UnreachableError(f"{self.name}: refused (HTTP {status}, {code}); {_CHAIN}, {UNSET}")


_CHAIN = "see AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL"
UNSET = "or unset LVLMVA_SHARED_STORE to go on without it (what is bought then may be bought twice)"


def _age_s(answer: dict[str, Any]) -> float:
    """Between two times of one clock, so that no machine's own clock matters."""
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return float((now - answer["LastModified"]).total_seconds())


def _md5(content: bytes) -> str:
    """What most servers say as an object's ETag; where it is something else, the object is read and compared."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _read_claim(content: bytes) -> dict[str, Any]:
    try:
        held = json.loads(content)
        return {"owner": str(held["owner"]), "host": str(held["host"])[:80], "seconds": float(held["seconds"])}
    except (ValueError, KeyError, TypeError):
        return {"owner": "", "host": "?", "seconds": CLAIM_S}
