-- Append to a stream; see Streams.publish.
-- KEYS[1]: the stream. ARGV: payload, about how many messages are kept, milliseconds after which an unused stream ends.
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*', 'p', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
