-- End a fact; see Store.withdraw. Returns 1 if there was something to end.
-- KEYS, ARGV[1], ARGV[2]: see facts. ARGV[3] key, [4] channel
-- include: facts
local ended = finish(ARGV[3])
save()
if not ended then
  return 0
end
redis.call('PUBLISH', ARGV[4], '')
return 1
