-- Places.standing. No ARGV. Answers {running by band}, tokens, {waiting by band}, mean time between releases.
-- include: places
open_state()
if now >= s[NEXT_END] then
  expire()
  save()
end
local running, waiting = {}, {}
for band = 1, 4 do
  running[band], waiting[band] = s[RUNNING + band], s[WAITING + band]
end
return {running, sum(TOKENS), waiting, interval()}
