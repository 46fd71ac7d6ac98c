// The tabs of a job. Each is made when it is opened, and looks again with every look at the job.
import { h } from "../dom.js";
import { clock, count, exact } from "../format.js";
import { Checkpoints } from "./checkpoints-tab.js";
import { Config } from "./config-tab.js";
import { Listing, cell, moved } from "./list-tab.js";
import { Logs } from "./logs-tab.js";
import { Metrics } from "./metrics-tab.js";
import { Samples } from "./samples-tab.js";

class Overview extends Listing {
  constructor(place, address) {
    super(place, address, {
      path: "/attempts", caption: "Attempts", none: "Not launched yet.", mark: moved, key: (one) => `${one.id} ${one.ended_at} ${one.started_at}`,
      columns: [["Attempt"], ["Began by"], ["From step", "num"], ["To step", "num"], ["Devices"], ["Started"], ["Ended"], ["How it ended"]],
      row: (one) => h("tr", {}, cell(String(one.number)), cell(one.trigger), cell(count(one.start_step), "num"), cell(count(one.end_step), "num"), cell(one.devices.join(", ")),
        cell(clock(one.started_at), "", exact(one.started_at)), cell(clock(one.ended_at), "", exact(one.ended_at)), cell(one.message ?? one.outcome, "whole")),
    });
  }
}

class Events extends Listing {
  constructor(place, address) {
    super(place, address, {
      path: "/events", caption: "Events, newest first", none: "Nothing has happened yet.", mark: (job) => `${moved(job)} ${job.progress.updated_at}`,
      columns: [["When"], ["By"], ["What"], ["Message"]],
      row: (one) => h("tr", {}, cell(clock(one.at), "num", exact(one.at)), cell(one.actor), cell(one.kind), cell(one.message, "whole")),
    });
    this.newestFirst = true;
  }
}

export const TABS = { overview: Overview, metrics: Metrics, logs: Logs, checkpoints: Checkpoints, samples: Samples, config: Config, events: Events };
