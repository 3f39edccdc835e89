-- One exchange of a router with the membership that routers share, in one step.
--
--   KEYS  1 meta     hash: life, count, epoch, time
--         2 until    sorted set: node by when it is out, milliseconds of this server's clock
--         3 records  hash: node's record, "<boot> <sequence> <node's fingerprint>\n<64 bytes of signature><body>"
--         4 changes  sorted set: node by the count of its last change; one without a record is gone
--   ARGV  1 the channel, 2 what the router asks and tells, in msgpack (router/exchange.py, Ask)
--
-- `count` numbers the changes, and is where a reader goes on; `epoch` counts those that change a ring. A `life` is
-- one unbroken history of these keys: a new one begins where they were emptied, lost writes or were tampered with,
-- and whoever knows another life, or has not seen this server's clock of the last moments, may read and not write.
local meta, expiry, records, changes = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local channel, ask = ARGV[1], cmsgpack.unpack(ARGV[2])
local call = redis.call

local clock = call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function whole(text)
    local number = tonumber(text)
    if number and number >= 0 and number < 2 ^ 52 then return math.floor(number) end
end

-- Keys of another type, or with half of an entry, are somebody else's doing.
for i, kind in ipairs({'hash', 'zset', 'hash', 'zset'}) do
    local found = call('TYPE', KEYS[i]).ok
    if found ~= kind and found ~= 'none' then call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4]) end
end
local kept = call('HMGET', meta, 'life', 'count', 'epoch', 'time')
local life, count, epoch, last = kept[1], whole(kept[2]), whole(kept[3]), whole(kept[4])
local broken = not (life and count and epoch and last) or (life == ask.life and count < ask.seen)
local size = call('HLEN', records)
if size ~= call('ZCARD', expiry) or size > call('ZCARD', changes) then broken = true end
if broken then
    -- Halves of entries go without a word: nobody has said that these nodes are gone.
    for _, id in ipairs(call('HKEYS', records)) do
        if not call('ZSCORE', expiry, id) then call('HDEL', records, id) end
    end
    for _, key in ipairs({expiry, changes}) do
        for _, id in ipairs(call('ZRANGE', key, 0, -1)) do
            if call('HEXISTS', records, id) == 0 then call('ZREM', key, id) end
        end
    end
    life, count, epoch = ask.candidate, math.max(count or 0, ask.seen), epoch or 0
    for _, id in ipairs(call('HKEYS', records)) do
        count = count + 1
        call('ZADD', changes, count, id)
    end
end

local loud = false
local function changed(id)
    count = count + 1
    call('ZADD', changes, count, id)
end
local function drop(id)
    call('ZREM', expiry, id)
    call('HDEL', records, id)
    changed(id)
    epoch = epoch + 1
    loud = true
end
local function in_chunks(list, size, act)
    for first = 1, #list, size do
        act({unpack(list, first, math.min(first + size - 1, #list))})
    end
end

-- Where nobody came for a while (this server was away), or its clock jumped, times say nothing: all begin anew.
if not last or now < last or now - last > ask.slack then
    in_chunks(call('ZRANGE', expiry, 0, -1), 500, function(ids)
        local scored = {}
        for _, id in ipairs(ids) do scored[#scored + 1] = now + ask.ttl; scored[#scored + 1] = id end
        call('ZADD', expiry, unpack(scored))
    end)
end
for _, id in ipairs(call('ZRANGEBYSCORE', expiry, '(' .. (now + 2 * ask.ttl), '+inf', 'LIMIT', 0, 500)) do
    call('ZADD', expiry, now + ask.ttl, id)
end
for _, id in ipairs(call('ZRANGEBYSCORE', changes, '(' .. count, '+inf', 'LIMIT', 0, 500)) do changed(id) end
for _, id in ipairs(call('ZRANGEBYSCORE', expiry, '-inf', now, 'LIMIT', 0, 1000)) do drop(id) end

-- What the router has not seen.
local page, cursor, more = {}, count, 0
local from = life == ask.life and ask.seen or 0
local found = call('ZRANGEBYSCORE', changes, '(' .. from, '+inf', 'WITHSCORES', 'LIMIT', 0, ask.page)
for i = 1, #found, 2 do
    local id = found[i]
    page[#page + 1] = id
    if call('HSTRLEN', records, id) > ask.most then
        page[#page + 1] = '!'
    else
        page[#page + 1] = call('HGET', records, id) or ''
    end
end
if #found == 2 * ask.page then cursor, more = tonumber(found[#found]), 1 end

-- What the router tells, where it knows this life and this server's clock.
local unknown, fresh = {}, 0
if more == 0 and life == ask.life and math.abs(now - ask.as_of) <= ask.slack then
    fresh = 1
    local function known(id)
        local value = call('HGET', records, id)
        if not value then return nil end
        local boot, sequence, print = string.match(value, '^(%x*) (%d+) (%x+)\n')
        return {boot = boot or '', sequence = whole(sequence) or 0, print = print}
    end
    for _, leave in ipairs(ask.leaves) do
        local id, boot, sequence = unpack(leave)
        local had = known(id)
        if had and had.boot == boot and had.sequence <= sequence then drop(id) end
    end
    for _, told in ipairs(ask.tells) do
        local id, boot, sequence, print, left, force, tell, record = unpack(told)
        local had = known(id)
        if not had or force or had.boot ~= boot or had.sequence < sequence or boot == '' then
            call('HSET', records, id, record)
            changed(id)
            if not had or had.print ~= print then epoch = epoch + 1 end
            loud = loud or tell or not had
        end
        call('ZADD', expiry, now + left, id)
    end
    in_chunks(ask.heard, 1000, function(heard)
        local scored = {}
        for i = 1, #heard, 2 do
            scored[i], scored[i + 1] = now + heard[i + 1] * 100, heard[i]
        end
        if call('ZADD', expiry, 'XX', 'GT', 'CH', unpack(scored)) < #heard / 2 then
            for i = 1, #heard, 2 do
                if not call('ZSCORE', expiry, heard[i]) then unknown[#unknown + 1] = heard[i] end
            end
        end
    end)
    for i = 1, #ask.checks, 2 do
        local record = call('HGET', records, ask.checks[i])
        if record and redis.sha1hex(record) ~= ask.checks[i + 1] then unknown[#unknown + 1] = ask.checks[i] end
    end
    cursor = count
end

epoch = math.max(epoch, whole(ask.epoch) or 0)
-- Those that are gone are kept for readers to come; once they are many, all readers begin anew, with their next ask.
local read_of = life
if call('ZCARD', changes) > 2 * call('HLEN', records) + 1024 then
    for _, id in ipairs(call('ZRANGE', changes, 0, -1)) do
        if call('HEXISTS', records, id) == 0 then call('ZREM', changes, id) end
    end
    life = ask.candidate
end
call('HSET', meta, 'life', life, 'count', count, 'epoch', epoch, 'time', now)
if loud then call('PUBLISH', channel, count) end
return {read_of, now, epoch, cursor, more, fresh, page, unknown}
