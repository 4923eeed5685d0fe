# Ask for a greeting and poll the database for it: producer.py BROKER DATABASE NAME
import json
import sqlite3
import sys
import time
import uuid

import pika

broker, database, name = sys.argv[1:]
job = str(uuid.uuid4())
with pika.BlockingConnection(pika.URLParameters(broker)) as connection:
    channel = connection.channel()
    channel.confirm_delivery()
    message = pika.BasicProperties(message_id=job, delivery_mode=2)
    channel.basic_publish("", "greetings", json.dumps({"name": name}), message, mandatory=True)
row, store = None, sqlite3.connect(database)
while row is None or row[0] in ("queued", "running", "retrying"):
    time.sleep(0.2)
    row = store.execute("SELECT state, output_tail FROM jobs WHERE id = ?", [job]).fetchone()
print(f"{row[0]}: {row[1].decode()}", end="")
