// A table that takes in changes cell by cell: of 200 rows only those are drawn anew that say something new.
//
// Rows are plain objects with a `key`; `name_more` stands small below the column `name`. All is set as text, never as
// HTML. On a phone, `style.css` makes cards of the rows. Ages and countdowns are worded here, so that the passing of
// time costs no message.

const CLOCK_MS = 2000;
const SCALES = { K: 1e3, k: 1e3, M: 1e6, G: 1e9, T: 1e12 };

function span(seconds) {
  const units = [[86400, "d"], [3600, "h"], [60, "min"]];
  for (const [length, unit] of units) if (seconds >= length) return `${Math.round(seconds / length)} ${unit}`;
  return `${Math.round(seconds)} s`;
}

function wording(kind, value, now) {
  if (value === null || value === undefined || value === "") return "-";
  if (kind === "age") return `${span(Math.max(0, now - value))} ago`;
  if (kind === "due") return value >= now ? `in ${span(value - now)}` : `${span(now - value)} behind`;
  return String(value);
}

// What a cell is sorted by: numbers with their unit's scale before words before what is unknown.
function weight(kind, value) {
  if (value === null || value === undefined || value === "" || value === "-") return [2, 0];
  if (typeof value === "number") return [0, kind === "age" ? -value : value];
  const number = kind === "number" ? parseFloat(value.replace(/^[^\d.+-]+/, "")) : NaN;
  if (Number.isNaN(number)) return [1, value];
  const unit = value.match(/[\d.]\s*([KkMGT])/);
  return [0, number * (unit ? SCALES[unit[1]] : 1)];
}

// `sign`: 1 for the least first, -1 for the greatest; what is unknown is at the end either way.
function compare(left, right, sign) {
  if (left[0] !== right[0]) return left[0] - right[0];
  if (typeof left[1] === "string") return sign * left[1].localeCompare(right[1], undefined, { numeric: true });
  return sign * (left[1] - right[1]);
}

const Row = {
  props: { row: Object, columns: Array, now: Number },
  template: `
    <tr>
      <td v-for="column in columns" :key="column.name" :data-label="column.label"
          :class="[column.kind, { empty: blank(column) }]">
        <template v-if="column.kind === 'state'">
          <span :class="['badge', row.tone]">{{ row[column.name] }}</span>
          <a v-if="row.mark" class="badge warn" :href="row.mark_href">{{ row.mark }}</a>
        </template>
        <span v-else-if="column.kind === 'mark' && row[column.name]" class="badge warn">{{ row[column.name] }}</span>
        <template v-else-if="column.kind === 'progress'">
          <span class="bar" role="progressbar" :aria-valuenow="Math.round(100 * (row[column.name] ?? 0))"
                aria-valuemin="0" aria-valuemax="100" :aria-label="column.label">
            <span :style="{ transform: 'scaleX(' + (row[column.name] ?? 0) + ')' }"></span>
          </span>
          <span class="steps">{{ row.steps }}</span>
        </template>
        <a v-else-if="column.kind === 'link' && row.href" :href="row.href">{{ row[column.name] }}</a>
        <template v-else>{{ worded(column) }}</template>
        <small v-if="row[column.name + '_more']">{{ row[column.name + "_more"] }}</small>
      </td>
    </tr>`,
  methods: {
    worded(column) {
      const timed = column.kind === "age" || column.kind === "due";
      return wording(column.kind, this.row[column.name], timed ? this.now : 0);
    },
    blank(column) {
      const value = this.row[column.name];
      return value === null || value === undefined || value === "" || value === "-";
    },
  },
};

export default {
  components: { Row },
  props: { title: String, columns: Array, rows: Array, lanes: Boolean, nothing: String, clock: Number, atFirst: Number },
  template: `
    <section class="live-table">
      <div class="table-head">
        <h2>{{ title }} <small v-if="list.length > 1">{{ counted }}</small></h2>
        <input v-if="list.length > 12" v-model="wanted" type="search" placeholder="Filter" aria-label="Filter rows">
      </div>
      <div v-if="lanes && list.length" class="lanes" role="group" aria-label="States">
        <button v-for="[state, lane] in laneList" :key="state" type="button"
                :class="['badge', lane.tone]" :aria-pressed="only === state" @click="only = only === state ? '' : state">
          {{ state }} <b>{{ lane.count }}</b>
        </button>
      </div>
      <p v-if="!list.length" class="nothing">{{ nothing }}</p>
      <table v-else>
        <thead>
          <tr>
            <th v-for="column in columns" :key="column.name" :class="column.kind" scope="col" :aria-sort="order(column)">
              <button type="button" @click="sort(column)">{{ column.label }}</button>
            </th>
          </tr>
        </thead>
        <tbody>
          <Row v-for="row in shown" :key="row.key" :row="row" :columns="columns" :now="timed ? now : 0" />
        </tbody>
      </table>
      <button v-if="list.length && chosen.length > shown.length" type="button" class="more" @click="limit = Infinity">
        Show all {{ chosen.length }}
      </button>
    </section>`,
  data() {
    return {
      list: this.rows,
      wanted: "",
      only: "",
      by: null,
      down: false,
      limit: this.atFirst,
      skew: this.clock - Date.now() / 1000, // the reader's clock may be wrong
      now: this.clock,
    };
  },
  mounted() {
    this.timer = setInterval(() => (this.now = Date.now() / 1000 + this.skew), CLOCK_MS);
  },
  unmounted() {
    clearInterval(this.timer);
  },
  watch: {
    rows(rows) {
      this.list = rows;
    },
  },
  computed: {
    laneList() {
      const found = new Map();
      for (const row of this.list) {
        const lane = found.get(row.lane);
        if (lane) lane.count += 1;
        else found.set(row.lane, { count: 1, tone: row.tone, place: row.place ?? 0 });
      }
      return [...found].sort((left, right) => left[1].place - right[1].place);
    },
    chosen() {
      const words = this.wanted.toLowerCase().split(/\s+/).filter(Boolean);
      let rows = this.only ? this.list.filter((row) => row.lane === this.only) : this.list;
      if (words.length) {
        const text = (row) => Object.values(row).join(" ").toLowerCase();
        rows = rows.filter((row) => words.every((word) => text(row).includes(word)));
      }
      if (!this.by) return rows;
      const { name, kind } = this.by;
      const sign = this.down ? -1 : 1;
      return [...rows].sort((left, right) => compare(weight(kind, left[name]), weight(kind, right[name]), sign));
    },
    timed() {
      return this.columns.some((column) => column.kind === "age" || column.kind === "due");
    },
    shown() {
      return this.chosen.slice(0, this.limit);
    },
    counted() {
      return this.chosen.length === this.list.length ? this.list.length : `${this.chosen.length} of ${this.list.length}`;
    },
  },
  methods: {
    // Called with what has changed: fields by key, whole new rows, keys that are gone.
    patch(changed, added, gone) {
      if (gone.length) this.list = this.list.filter((row) => !gone.includes(row.key));
      const byKey = new Map(this.list.map((row) => [row.key, row]));
      for (const [key, fields] of changed) Object.assign(byKey.get(key) ?? {}, fields);
      for (const [place, row] of added) this.list.splice(place, 0, row);
    },
    sort(column) {
      if (this.by?.name !== column.name) [this.by, this.down] = [column, false];
      else if (!this.down) this.down = true;
      else [this.by, this.down] = [null, false];
    },
    order(column) {
      return this.by?.name !== column.name ? null : this.down ? "descending" : "ascending";
    },
  },
};
