-- Whether scripts run here and may write: what a replica, a full Redis or a narrow ACL refuses.
-- KEYS[1]: a key of its own. Returns 1.
redis.call('SET', KEYS[1], '1', 'PX', '1000')
return 1
