// The arithmetic of bench.decide (options, breakeven) and its words (report.decision_text), for the explorer.
// Pure functions of data and controls; tests hold them against the Python to 1e-9.
const EXPLORER = (() => {
  const HOUR_S = 3600;

  const replicaHourUsd = (o) => o.num_gpus * o.usd_per_gpu_hour;
  const replicaMonthUsd = (o) => replicaHourUsd(o) * o.hours_per_month / o.num_sharing;
  const capacity = (o, rate) =>
    rate * HOUR_S * o.hours_per_month * o.max_utilisation_ratio / o.peak_to_mean / o.num_sharing;
  const paidHourTokens = (o, rate) => rate * HOUR_S * o.max_utilisation_ratio;
  const replicas = (o, volume) =>
    Math.max(o.min_replicas, Math.ceil(volume / capacity(o, o.tokens_per_s) * (1 - 1e-12)));

  function gpuHours(o, volume) {
    if (o.billing === "around_clock") return replicas(o, volume) * o.num_gpus * o.hours_per_month / o.num_sharing;
    let hours = volume / paidHourTokens(o, o.tokens_per_s);
    if (o.whole_hours) hours = Math.ceil(hours * o.num_sharing * (1 - 1e-12)) / o.num_sharing;
    return hours * o.num_gpus;
  }
  const monthlyUsd = (o, volume) => gpuHours(o, volume) * o.usd_per_gpu_hour + o.fixed_usd_per_month;
  function utilisation(o, volume) {
    const paid = gpuHours(o, volume) / o.num_gpus * HOUR_S;
    return paid ? volume / (o.tokens_per_s * paid) : 0;
  }

  function apiUsdPerToken(a, mix) {
    const inputRatio = mix.input_parts / (mix.input_parts + mix.output_parts);
    const cachedRatio = a.cached_ratio === null ? mix.cached_ratio : a.cached_ratio;
    const cached = inputRatio * cachedRatio;
    const usd = (inputRatio - cached) * a.input_per_million + cached * a.cached_per_million + (1 - inputRatio) * a.output_per_million;
    return usd / 1e6 * (1 - a.discount_ratio);
  }

  const safe = (numerator, denominator) => (denominator > 0 ? numerator / denominator * (1 - 1e-12) : 0);
  const NEVER = { first: null, always: null };
  function onStairs(a, c, k, fixed, least) {
    const gain = a * k - c;
    if (gain <= 0 && !(c === 0 && fixed === 0)) return NEVER;
    const firstN = Math.max(least, Math.ceil(safe(fixed, gain)));
    const first = Math.max((fixed + firstN * c) / a, firstN > least ? k * (firstN - 1) : 0);
    const lastN = Math.max(least, Math.ceil(safe(fixed + c, gain)));
    const always = Math.max((fixed + lastN * c) / a, lastN > least ? k * (lastN - 1) : 0);
    return { first, always: Math.max(first, always) };
  }
  function crossing(o, a, rate) {
    if (a <= 0 || rate <= 0) return NEVER;
    const fixed = o.fixed_usd_per_month;
    if (o.billing === "around_clock") return onStairs(a, replicaMonthUsd(o), capacity(o, rate), fixed, o.min_replicas);
    const hourUsd = replicaHourUsd(o), hourTokens = paidHourTokens(o, rate);
    if (o.whole_hours) return onStairs(a, hourUsd / o.num_sharing, hourTokens / o.num_sharing, fixed, 1);
    const perToken = hourUsd / hourTokens;
    if (perToken >= a) return NEVER;
    const volume = fixed / (a - perToken);
    return { first: volume, always: volume };
  }

  // Throughput at a share of input, relative to the page's own mix: 1 / rate on the line between the known mixes around it.
  function between(mixes, key, share) {
    const below = mixes.filter((m) => m.input_ratio <= share), above = mixes.filter((m) => m.input_ratio >= share);
    if (!below.length || !above.length) return (above.length ? above[0] : below[below.length - 1])[key];
    const a = below[below.length - 1], b = above[0];
    if (a.input_ratio === b.input_ratio) return a[key];
    const w = (share - a.input_ratio) / (b.input_ratio - a.input_ratio);
    return a[key] === null || b[key] === null || Math.min(a[key], b[key]) <= 0 ? null : 1 / ((1 - w) / a[key] + w / b[key]);
  }
  function atMix(o, mix) {
    if (o.mixes.length < 2) return o;
    const share = mix.input_parts / (mix.input_parts + mix.output_parts);
    return { ...o, tokens_per_s: between(o.mixes, "value", share), low_tokens_per_s: between(o.mixes, "low", share),
      high_tokens_per_s: between(o.mixes, "high", share) };
  }

  // The options and APIs with the controls put in: GPU controls on the chosen option, prices on the chosen API.
  function apply(data, c) {
    const mix = { input_parts: c.input_parts, output_parts: c.output_parts, cached_ratio: data.cached_ratio };
    const options = data.options.map((start, i) => {
      const o = atMix(start, mix);
      if (i !== c.option) return o;
      // the control is the throughput at the page's own mix; elsewhere it scales what is known there
      const scale = c.tokens_per_s / start.tokens_per_s;
      const end = (v) => (v === null ? null : v * scale);
      return { ...o, usd_per_gpu_hour: c.usd_per_gpu_hour, tokens_per_s: end(o.tokens_per_s),
        low_tokens_per_s: end(o.low_tokens_per_s), high_tokens_per_s: end(o.high_tokens_per_s),
        max_utilisation_ratio: c.max_utilisation_ratio, peak_to_mean: c.peak_to_mean, min_replicas: c.min_replicas };
    });
    const apis = data.apis.map((a, i) => {
      if (i !== c.api) return a;
      const cached = a.input_per_million > 0 ? a.cached_per_million * (c.input_per_million / a.input_per_million) : c.input_per_million;
      return { ...a, input_per_million: c.input_per_million, cached_per_million: cached, output_per_million: c.output_per_million };
    });
    return { options, apis, mix };
  }

  function explore(data, c) {
    const { options, apis, mix } = apply(data, c);
    const option = options[c.option], api = apis[c.api];
    const price = apiUsdPerToken(api, mix);
    const at = crossing(option, price, option.tokens_per_s);
    const known = option.low_tokens_per_s !== null && option.high_tokens_per_s !== null;
    return {
      options, apis, mix, volume: c.volume,
      monthly_usd: [...options.map((o) => monthlyUsd(o, c.volume)), ...apis.map((a) => c.volume * apiUsdPerToken(a, mix))],
      replicas: options.map((o) => replicas(o, c.volume)),
      utilisation: options.map((o) => utilisation(o, c.volume)),
      first_tokens: at.first, always_tokens: at.always,
      low_tokens: known ? crossing(option, price, option.high_tokens_per_s).first : null,
      high_tokens: known ? crossing(option, price, option.low_tokens_per_s).first : null,
      never_within_interval: known && crossing(option, price, option.low_tokens_per_s).first === null,
      answer: answer(options, apis, mix, c.volume),
    };
  }

  // --- words -------------------------------------------------------------------------------------------------
  const grouped = (text) => text.replace(/^\d+/, (whole) => whole.replace(/\B(?=(\d{3})+$)/g, ","));
  function significant(value, digits = 3) {
    if (value === 0) return "0";
    if (!Number.isFinite(value)) return value > 0 ? "∞" : "-∞";
    const rounded = Number(value.toPrecision(digits));
    const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(Math.abs(rounded))));
    return grouped(rounded.toFixed(decimals));
  }
  function usdText(value) {
    if (!Number.isFinite(value)) return "$∞";
    if (value >= 1000) return "$" + grouped(value.toFixed(0));
    if (value >= 1 || value === 0) return "$" + grouped(value.toFixed(2));
    return "$" + significant(value);
  }
  function volumeText(tokens) {
    for (const [factor, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (tokens >= factor * 0.9995) return `${significant(tokens / factor)} ${letter}`;
    return significant(tokens);
  }
  function answer(options, apis, mix, volume) {
    const least = (list, usd) => list.reduce((best, x) => (usd(x) < usd(best) ? x : best));
    const host = least(options, (o) => monthlyUsd(o, volume));
    const api = least(apis, (a) => apiUsdPerToken(a, mix));
    const ours = monthlyUsd(host, volume), theirs = volume * apiUsdPerToken(api, mix);
    const found = crossing(host, apiUsdPerToken(api, mix), host.tokens_per_s);
    let when = `beats ${api.name} from ${volumeText(found.first || 1)} tokens a month on`;
    if (found.first === null) when = `never beats ${api.name}, whatever the volume`;
    else if (found.first === 0) when = `beats ${api.name} at any volume`;
    else if (found.always > found.first * 1.001) when += `, for good from ${volumeText(found.always)}`;
    const head = `At ${volumeText(volume)} tokens a month`;
    if (ours <= theirs) {
      const times = ours > 0 ? `, ${significant(theirs / ours)} times as much` : "";
      return `${head}, self-hosting is cheapest: ${host.name} for ${usdText(ours)} a month; the cheapest API, ${api.name}, costs ${usdText(theirs)}${times}; ${host.name} ${when}.`;
    }
    const times = theirs > 0 ? `, ${significant(ours / theirs)} times as much` : "";
    return `${head}, an API is cheapest: ${api.name} for ${usdText(theirs)} a month; the cheapest self-hosted option, ${host.name}, costs ${usdText(ours)}${times}; ${host.name} ${when}.`;
  }

  function start(data, option = data.option, api = data.api) {
    const o = data.options[option], a = data.apis[api];
    return { volume: data.volume, input_parts: data.input_parts, output_parts: data.output_parts, option, api,
      usd_per_gpu_hour: o.usd_per_gpu_hour, tokens_per_s: o.tokens_per_s, max_utilisation_ratio: o.max_utilisation_ratio,
      peak_to_mean: o.peak_to_mean, min_replicas: o.min_replicas, input_per_million: a.input_per_million, output_per_million: a.output_per_million };
  }

  return { explore, apply, start, monthlyUsd, apiUsdPerToken, capacity, usdText, volumeText, significant };
})();
