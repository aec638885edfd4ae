"""An S3 server on loopback (moto's), behind a proxy that makes chosen requests fail.

with S3Server() as s3:
    s3.make_bucket("bucket")
    s3.fail("00001.safetensors", status=503, times=2)
"""

import logging

import boto3
from moto.server import ThreadedMotoServer

from faulty_server import Proxy, Server

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}

logging.getLogger("werkzeug").setLevel(logging.ERROR)


class S3Server(Server):
    def __init__(self):
        super().__init__(Proxy)
        self.moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)

    def __enter__(self):
        self.moto.start()
        self.behind = "{}:{}".format(*self.moto.get_host_and_port())
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        self.client = boto3.client("s3", endpoint_url=f"http://{self.behind}", **keys)
        return super().__enter__()

    def __exit__(self, *_):
        super().__exit__()
        self.moto.stop()

    def make_bucket(self, name):
        self.client.create_bucket(Bucket=name)

    def delete_bucket(self, name):
        for key in self.names(name):
            self.delete(name, key)
        self.client.delete_bucket(Bucket=name)

    def wipe(self):
        """No buckets."""
        for found in self.client.list_buckets()["Buckets"]:
            self.delete_bucket(found["Name"])

    def names(self, bucket):
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=bucket).get("Contents", [])]

    def get(self, bucket, key):
        return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def put(self, bucket, key, data):
        self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def delete(self, bucket, key):
        self.client.delete_object(Bucket=bucket, Key=key)
