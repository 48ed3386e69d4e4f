-- A request has ended: its stream's places go, and what its tokens were estimated at is made right.
--
-- KEYS: as of charge.lua. ARGV: the stream's name, and for each payer the rate of tokens a second and what to add, which may be negative.
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
for i = 1, #KEYS / 2 do
  local rate, more = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
  redis.call('ZREM', KEYS[2 * i], ARGV[1])
  if rate > 0 and more ~= 0 then
    local kept = redis.call('HMGET', KEYS[2 * i - 1], 't', 'ta')
    local passed = math.max(0, now - (tonumber(kept[2]) or now))
    local used = math.max(0, math.max(0, (tonumber(kept[1]) or 0) - passed * rate) + more)
    redis.call('HSET', KEYS[2 * i - 1], 't', used, 'ta', now)
    local life_ms = math.ceil(used / rate * 1000) + 1000
    if redis.call('PTTL', KEYS[2 * i - 1]) < life_ms then redis.call('PEXPIRE', KEYS[2 * i - 1], life_ms) end
  end
end
return 0
