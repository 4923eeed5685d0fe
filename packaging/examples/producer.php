<?php // Ask for a greeting and poll the database for it: producer.php BROKER DATABASE NAME
require 'PhpAmqpLib/autoload.php'; // of Debian's php-amqplib; Composer's is vendor/autoload.php
[, $broker, $database, $name] = $argv;
$job = bin2hex(random_bytes(16));
$at = parse_url($broker) + ['port' => 5672];
$connection = new PhpAmqpLib\Connection\AMQPStreamConnection(
    $at['host'], $at['port'], $at['user'], $at['pass'], rawurldecode(substr($at['path'], 1)));
$channel = $connection->channel();
$channel->confirm_select();
$channel->basic_publish(new PhpAmqpLib\Message\AMQPMessage(
    json_encode(['name' => $name]), ['message_id' => $job, 'delivery_mode' => 2]), '', 'greetings');
$channel->wait_for_pending_acks();
$query = (new PDO("sqlite:$database"))->prepare('SELECT state, output_tail FROM jobs WHERE id = ?');
do {
    usleep(200000);
    $query->execute([$job]);
    $row = $query->fetch();
} while (!$row || in_array($row['state'], ['queued', 'running', 'retrying']));
echo "$row[state]: $row[output_tail]";
